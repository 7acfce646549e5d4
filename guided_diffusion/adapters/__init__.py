"""Networks of other libraries as denoisers of ours. Those libraries are imported where they are used."""
