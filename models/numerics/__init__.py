"""Numbers: random streams by name, the precision of products, work in cache-sized chunks."""
