"""``python -m palf_dist.doctor``: the survey as a job of the cluster that is looked at; one line of JSON on stdout."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from palf_dist.doctor.survey import SURVEY_MARK, load_any_config, take_survey
from palf_dist.errors import PalfError


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="python -m palf_dist.doctor")
    parser.add_argument("--run-dir")
    parser.add_argument("--config")
    options = parser.parse_args()
    try:
        config = None if options.config is None else load_any_config(options.config)
        print(SURVEY_MARK + json.dumps(asdict(take_survey("auto", options.run_dir, config))), flush=True)
    except PalfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
