"""One sampling run on any number of processes: from its job to the files in its folder."""
