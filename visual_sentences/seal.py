"""The end of a build: results of units to the manifest."""

from collections import Counter
from collections.abc import Iterable, Sequence

from visual_sentences.job import Job
from visual_sentences.manifest import Manifest, SourceEntry
from visual_sentences.plan import Plan
from visual_sentences.spec import Spec
from visual_sentences.unit import Result


def seal(
    spec: Spec, job: Job, plans: Sequence[Plan], results: Sequence[Result], *, row_len: int
) -> Manifest:
    """Make the manifest of plans whose units are all done; `results` are in their order.

    The shards of an older manifest of the same build keep their places, so that a row of a source
    keeps its number.
    """
    assert len(results) == sum(len(plan.units) for plan in plans), "a unit is not done"
    bad: dict[str, Counter[str]] = {source.name: Counter() for source in spec.sources}
    inputs, good = Counter[str](), Counter[str]()
    for name, reason, _ in unusable(plans[-1:], results):
        bad[name][reason] += 1
    for plan in plans[-1:]:
        for name, listed in plan.listed.items():
            inputs[name] += len(listed.bad)
    for result in results:
        inputs[result.source] += result.inputs
        good[result.source] += result.good
    return Manifest(
        tokenizer=job.tokenizer_id,
        codebook_size=job.codebook_size,
        codes_per_image=job.codes_per_image,
        image_size=job.image_size,
        row_len=row_len,
        seed=spec.seed,
        sources=tuple(
            SourceEntry(
                name=source.name,
                kind=source.kind,
                weight=source.weight,
                repeat=source.repeat,
                preprocess=source.preprocess,
                license=source.license,
                note=source.note,
                inputs=inputs[source.name],
                good=good[source.name],
                bad=dict(sorted(bad[source.name].items())),
                augment=source.augment,
                classes=tuple(job.classes.get(source.name, ())),
            )
            for source in spec.sources
        ),
        shards=tuple(shard for result in results for shard in result.shards),
        form=job.form,
        generation=len(plans),
    )


def unusable(plans: Sequence[Plan], results: Iterable[Result]) -> list[tuple[str, str, str]]:
    """Return (source, reason, name) of all that cannot be used, by the last plan and all units."""
    listed = [
        (name, reason, key)
        for plan in plans[-1:]
        for name, entry in plan.listed.items()
        for key, reason in entry.bad
    ]
    return listed + [(r.source, reason, key) for r in results for key, reason in r.bad]
