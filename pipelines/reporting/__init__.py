"""Parts of the `report` stage: what runs have to say, how they compare, and the page."""
