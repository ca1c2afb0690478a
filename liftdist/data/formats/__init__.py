"""Data formats, one per file: ``FIELDS`` and ``read(record)``, see :data:`liftdist.registry.FORMATS`.

Must not know tokenizers.
"""
