"""Show: tables, pages and figures from rows and files alone."""
