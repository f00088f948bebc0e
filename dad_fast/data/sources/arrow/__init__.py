"""Tables of images: Hugging Face data sets and Parquet, read at random from Arrow files.

Own reader: an image's bytes lie in an Arrow file as they are, so a loader process needs its place
only, and neither `datasets` nor pyarrow (a second to import, 2 ms a row).
"""
