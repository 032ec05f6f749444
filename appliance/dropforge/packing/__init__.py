"""Documents into token buckets of few fixed shapes, in an order that a seed decides.

rows        the data set as token arrays: lengths and counted targets of every document
bins        first-fit decreasing
shapes      the few fixed shapes of a micro-batch
plan        which documents every optimizer step of an epoch sees, and in which micro-batches
collate     documents -> one flat buffer with the model's arguments in it
feed        the same ahead of time, in a thread
choose      whether packing pays, with the reason
"""
