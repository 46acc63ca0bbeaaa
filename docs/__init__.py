"""The documentation. `docs.tools` writes its generated parts."""
