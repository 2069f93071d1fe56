"""The report of finished merges as one HTML page. Knows no Ray and no weights."""
