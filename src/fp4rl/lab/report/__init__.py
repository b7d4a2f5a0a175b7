"""The report of a suite: collected from run folders, shown in the terminal and as one HTML file."""
