"""The folder from which a merge resumes, and what is prepared before any actor starts."""
