"""Small things that every process uses: cache folders, the inbox of a loop, start progress, the version."""
