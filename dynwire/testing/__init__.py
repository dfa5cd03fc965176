"""What users can test services with: the fault proxy (`dynwire.testing.proxy`), fixtures (`dynwire.testing.pytest_plugin`)."""
