"""The same loop on several devices, through Ray Train."""
