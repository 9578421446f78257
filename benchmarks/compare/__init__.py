"""graphgen and its peers under the same jobs: what runs them, the file of figures, the tables and the picture."""
