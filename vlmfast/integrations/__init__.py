"""How `patch` recognises and replaces layers of other libraries, one file or folder for each."""

from vlmfast.integrations.patching import PatchEntry, PatchReport, patch, unpatch

__all__ = ["PatchEntry", "PatchReport", "patch", "unpatch"]
