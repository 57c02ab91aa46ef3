"""The page of a device, the README's section and the history of releases, all from committed rows alone."""
