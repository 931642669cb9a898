#!/bin/sh
# Every benchmark, one after the other; `make bench` runs this. Give the machine nothing else to do.
# Exit status 1: a result beat its own limit (a measurement error). Missed targets are printed.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
status=0
"$python" -m bench.limits || status=1
"$python" -m bench.bench_ops || status=1
for scenario in prefill decode vector; do
  "$python" -m bench.bench_gateskip "$scenario" --work "$work" || status=1
done
"$python" -m bench.bench_moe || status=1
"$python" -m bench.bench_moe_model --work "$work" || status=1
"$python" -m bench.bench_vit --work "$work/vit" || status=1
"$python" -m bench.bench_exits || status=1
"$python" -m bench.bench_scales --work "$work/vit" || status=1
"$python" -m bench.bench_stream || status=1
exit $status
