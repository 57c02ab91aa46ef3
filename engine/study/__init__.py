"""Studies: settings and seeds over a base run, contrasts frozen before the first run, and the page of their results."""
