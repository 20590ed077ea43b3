"""What layers do around their attention: functions, a file for each family.

`vlmfast.nn` and the layers that `patch` puts in place of others are made of them.
"""
