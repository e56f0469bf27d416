"""Which sites to replace: the profile of the rootstock, the search with gates, and the choice."""
