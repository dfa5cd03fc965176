"""What users can test their own services with: the fault proxy (`dynwire.testing.proxy`) and fixtures (`dynwire.testing.pytest_plugin`)."""
