"""What users can test their own services with: the fault proxy (`dynwire.testing.proxy`). The memory plane needs no import."""
