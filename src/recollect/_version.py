"""The version, where the build and the server read it without importing the package's front."""

__version__ = "0.1.0"
