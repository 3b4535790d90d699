"""One study in one database, and the leases of its workers."""
