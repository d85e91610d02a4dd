#!/usr/bin/env bash
# Whether pyarrow's batches of a Parquet file stop at its row groups depends on whether a column is read as a dictionary.
#
# Versions:  pyarrow 26.0.1, 2026-11-30
# Guess:     iter_batches reads one row group after another, so a batch never has rows of two; or it always fills its
#            batch_size, as its documentation ("may be smaller if there aren't enough rows in the file") has it. How
#            a column is represented in memory decides neither.
# Behaviour: batches are filled across row groups. With read_dictionary for one column they are the same batches, cut
#            once more wherever a row group ends: 400 rows of groups of 300 come as 300 and 100. So the same rows come
#            in other batches, and code that resumes at a batch's number must keep this option.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet pyarrow==26.0.1
env/bin/python - <<'PY' | tee seen
import pyarrow as pa
import pyarrow.parquet as pq

texts = [str(number) for number in range(1000)]
pq.write_table(pa.table({"text": texts, "kind": ["a"] * 1000}), "a.parquet", row_group_size=300)
for names in ([], ["kind"]):
    file = pq.ParquetFile("a.parquet", read_dictionary=names)
    for size in (400, 1000):
        print(f"dictionaries {names}, batch_size {size}:", [len(batch) for batch in file.iter_batches(size)])
PY
diff seen - <<'EXPECTED'
dictionaries [], batch_size 400: [400, 400, 200]
dictionaries [], batch_size 1000: [1000]
dictionaries ['kind'], batch_size 400: [300, 100, 200, 200, 100, 100]
dictionaries ['kind'], batch_size 1000: [300, 300, 300, 100]
EXPECTED
echo "as described"
