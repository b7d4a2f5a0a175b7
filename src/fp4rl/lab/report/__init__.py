"""What a suite's runs allow one to say: collected from their folders, shown in the terminal and as one HTML file."""
