"""Tables of images: Hugging Face data sets and Parquet, read at random from Arrow files.

Own reader: an image's bytes lie in an Arrow file as they are, so a loader process needs their place
only, and neither `datasets` nor pyarrow, which take a second to import. CPU time for a JPEG of 86 KB:
0.02 ms; a row of `datasets` 0.10 ms; decoding 1.8 ms.
"""
