"""How `patch` recognises and replaces the layers of other libraries, one file for each library."""

from vlmfast.integrations.patching import PatchEntry, PatchReport, patch, unpatch

__all__ = ["PatchEntry", "PatchReport", "patch", "unpatch"]
