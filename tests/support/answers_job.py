"""A job for the tests: `family_job`, and the model's answers with its cache and without (`answers_of`)."""

import family_job
from answers_of import answers_of


def main() -> None:
    family_job.main(answers_of)
