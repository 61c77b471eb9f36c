"""Parts that image tables, token tables and their readers share."""
