"""The store: artifacts under content keys on any file system, leases on them, and their verification."""
