"""Reports: videos and contact sheets as files, and one self-contained page that shows a comparison."""
