"""The shipped configurations. Installed as the package ``treepo.configs``."""
