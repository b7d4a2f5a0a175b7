"""The monitor: is this run well? Works live, and on any log whose metrics it knows."""
