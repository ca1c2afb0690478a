"""Data formats, one per file, see :data:`liftdist.registry.FORMATS`.

    FIELDS          the fields that a record must have, by which ``data.format: auto`` recognises it
    OPTIONAL        further fields that are used
    RESPONSE        the field that is learned, if it is one text
    read(record)    what the record says. Raises ``ValueError`` with a reason in one line

Must not know tokenizers.
"""
