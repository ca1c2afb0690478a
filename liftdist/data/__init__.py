"""From files and hub data sets to micro-batches.

    sources -> records (formats) -> chat -> tokenised -> mixture -> order -> batches

In: paths and settings, a tokenizer. Out: tensors of token ids, positions and labels, and the location of each sample
in its file. Must not know models or ranks' devices; the order of samples is a pure function of (seed, epoch).
"""
