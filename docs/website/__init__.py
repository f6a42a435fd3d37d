"""docs/ as a site: ``make docs`` runs ``python -m website.build``."""
