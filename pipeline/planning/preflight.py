"""What can be known to be wrong before anything starts: files that are not there, places that cannot be reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from graftwork.cluster.session.address import check_cluster, cluster_address
from graftwork.cluster.session.scratch import scratch_problem
from graftwork.pipeline.planning.limits import unreachable_limits
from graftwork.pipeline.planning.networks import network_paths, network_shortages
from graftwork.pipeline.planning.plan import Plan, carried_edits
from graftwork.pipeline.planning.texts import check_texts, text_shortages
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.errors import StoreError
from graftwork.specs.codec import PixelCodec, VaeCodec
from graftwork.specs.costs import scion_cost
from graftwork.specs.data import CaptionsData, ImageFiles, ImageFolderData, SyntheticData
from graftwork.specs.edits import OperatorEdits, overlapping
from graftwork.specs.figures import amount
from graftwork.specs.figures import counted as number_of
from graftwork.specs.hub import is_hub_id, is_offline, local_path, whereabouts
from graftwork.specs.job import JobSpec
from graftwork.specs.metrics import IMAGES, INCEPTION_FILE, KID_SUBSET_IMAGES, METRICS, Metric, inception_file
from graftwork.specs.problems import refusal
from graftwork.specs.reading.load import SpecError
from graftwork.specs.rootstock import CheckpointWeights
from graftwork.specs.sampler import SchedulerSampler
from graftwork.stages.catalog.distill import streaming_memory
from graftwork.stages.catalog.finetune import teacher_flops
from graftwork.stages.catalog.flops import TRAINING, graft_flops
from graftwork.stages.catalog.reference import reference_steps
from graftwork.stages.data.caption_files import ACCEPTED as ACCEPTED_CAPTIONS
from graftwork.stages.data.caption_files import UnfitCaptions
from graftwork.stages.data.captions import read_captions
from graftwork.stages.data.listing import Listing, counted, list_images, listed
from graftwork.stages.data.sources import (
    MIN_HELDOUT,
    are_here,
    class_folders,
    class_names,
    class_sizes,
    different_prompts,
    heldout_of,
    num_classes,
    scarce,
    split_sizes,
)
from graftwork.stages.features.codec import misfits, vae_place

ACCEPTED_CHECKPOINT = "a checkpoint of the job's model and classes"
ACCEPTED_VAE = "an AutoencoderKL with all of its weights, as floating-point numbers"
ACCEPTED_REFERENCE = "an .npz with mu and sigma, or a folder with images, all of one size, directly in it"
PLANNED_HEADERS = 1000  # of images that a plan reads


def check(job: JobSpec) -> None:
    """Raise SpecError, one line a problem, for all that a run of the job would not find, or not find enough of."""
    lines = [*absent(job), *shortages(job)]
    if lines:
        raise SpecError(lines)


def machine_problems() -> list[str]:
    """Return a line for what this machine's environment says of Ray that is of no use, without asking a cluster."""
    try:
        problem = scratch_problem() if cluster_address() is None else None
    except SpecError as error:
        return error.lines
    return [problem] if problem else []


def check_ray() -> None:
    """Raise SpecError where neither the cluster of RAY_ADDRESS can be joined nor a Ray of our own be started."""
    if lines := machine_problems():
        raise SpecError(lines)
    if (address := cluster_address()) is not None:
        check_cluster(address)


def check_places(store: Store) -> None:
    """Raise SpecError if the store cannot be written."""
    try:
        store.check_writable()
    except StoreError as error:
        raise SpecError([str(error)]) from None


def check_pending(made: Plan, store: Store, max_headers: int | None = None) -> list[str]:
    """Check the files that the plan's steps read, but for those in the store; see `check_files`."""
    job = made.job
    scions = any(isinstance(edit, OperatorEdits) and edit.scions for edit in job.graft)
    weights = isinstance(job.weights, CheckpointWeights) or isinstance(job.codec, VaeCodec)
    scheduler = isinstance(job.evaluate.sampler, SchedulerSampler)
    if not (weights or scions or scheduler or job.text or _with_reference(job)):
        return []
    return check_files(job, [step for step, state in made.states(store).items() if state != "cached"], max_headers)


def check_files(job: JobSpec, pending: Collection[str], max_headers: int | None = None) -> list[str]:
    """Return lines on what pending steps will read; raise SpecError if they need other files than those that are here.

    Names, shapes and headers are read; what the numbers are shows when the step reads them. A file on another machine
    is not looked for: `absent` names it. max_headers: of images, beyond which none of a folder's are read; where it is
    given, as for a plan, texts are not measured either.
    """
    lines: list[str] = []
    notes: list[str] = []
    for field, source in _checkpoints(job, pending):
        if _absent_weights(field, source):
            continue
        from graftwork.models.checkpoints import UnfitCheckpoint  # torch loads with it

        try:
            notes += [f"{field}: {note}" for note in _check_checkpoint(job, field, source)]
        except UnfitCheckpoint as error:
            lines.append(refusal(field, error, ACCEPTED_CHECKPOINT))
    lines += _check_vae(job, pending)
    lines += _check_schedulers(job, pending)
    if max_headers is None:  # a plan need not load tokenizers
        lines += check_texts(job, pending)
    try:
        notes += _check_reference(job, pending, max_headers)
    except ValueError as error:
        lines.append(refusal("evaluate.reference", error, ACCEPTED_REFERENCE))
    if lines:
        raise SpecError(lines)
    return notes


def _checkpoints(job: JobSpec, pending: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the fields and paths of the checkpoints that pending steps read."""
    if isinstance(job.weights, CheckpointWeights) and "base" in pending:
        yield "weights.path", job.weights.path
    for number, edit in enumerate(job.graft):
        names = {f"distill/{one.name}" for one in job.rules()[number]}
        if isinstance(edit, OperatorEdits) and edit.scions is not None and names & set(pending):
            yield f"graft.{number}.scions", edit.scions


def _check_checkpoint(job: JobSpec, field: str, source: str) -> Iterator[str]:
    """Yield what is to be said of a checkpoint that fits the job; raise UnfitCheckpoint for another."""
    from graftwork.models import checkpoints
    from graftwork.models.rootstocks import config_of

    count = num_classes(job.data)
    shape = (job.codec.latent_channels(job.data), job.latent_side(), job.latent_side())
    config = config_of(job.model, shape, count or 0)
    labels = None
    if field == "weights.path" and isinstance(job.weights, CheckpointWeights) and are_here(job.data):
        names = class_names(job.data)
        if (rows := job.weights.rows(names)) is not None:
            labels = checkpoints.Labels(names, rows, job.seed)
            yield _labels_line(rows)
    # Scions do not see labels; the number of classes may be in data that are elsewhere.
    any_classes = field != "weights.path" or (labels is None and (count is None or _has_own_classes(job)))
    yield from checkpoints.check(source, config, labels=labels, any_classes=any_classes)


def _check_schedulers(job: JobSpec, pending: Collection[str]) -> Iterator[str]:
    """Yield a line for a scheduler that cannot sample the job's models, if a pending step samples with it."""
    steps = {"evaluate": "evaluate", "data": "synthesis"}
    for section, sampler in job.samplers().items():
        if not isinstance(sampler, SchedulerSampler) or not any(step.startswith(steps[section]) for step in pending):
            continue
        from graftwork.models.sampling.scheduled import UnfitScheduler, rehearse  # torch and diffusers load with it

        try:
            rehearse(sampler, job.model.prediction, isinstance(job.codec, PixelCodec))
        except UnfitScheduler as error:
            yield f"{section}.{error}"


def _has_own_classes(job: JobSpec) -> bool:
    return isinstance(job.weights, CheckpointWeights) and job.weights.classes is not None


def _labels_line(rows: Sequence[int | None]) -> str:
    fresh = rows.count(None)
    known = f"{len(rows) - fresh:,} of {len(rows):,} classes begin with rows of its label table"
    return f"{known}, {fresh:,} with fresh ones, and the null class with its own"


def _check_vae(job: JobSpec, pending: Collection[str]) -> list[str]:
    """Return a line if the VAE is not one, or not whole."""
    if not isinstance(job.codec, VaeCodec) or "features" not in pending or (folder := vae_place(job.codec)) is None:
        return []
    from graftwork.models.checkpoints import UnfitCheckpoint
    from graftwork.models.checkpoints.vae import check_vae

    try:
        check_vae(folder)
    except UnfitCheckpoint as error:
        return [refusal("codec.path", error, ACCEPTED_VAE)]
    return []


def _check_reference(job: JobSpec, pending: Collection[str], max_headers: int | None) -> list[str]:
    """Return notes on what is left out, or not looked at now; raise ValueError if samples cannot be held against it."""
    reference, metrics = job.evaluate.reference, _with_reference(job)
    if reference is None or not {*reference_steps(metrics).values()} & set(pending):
        return []
    if not Path(reference).exists():
        return []
    from graftwork.stages.evaluation.inception import (
        check_reference_file,
        reference_images,
        require_enough,
        require_one_size,
    )

    if not Path(reference).is_dir():
        check_reference_file(reference, metrics)
        return []
    images = reference_images(reference)
    require_enough(reference, len(images), metrics)
    others = {entry.name for entry in Path(reference).iterdir() if entry.is_file() and not entry.name.startswith(".")}
    kinds = Counter(Path(name).suffix.lower() for name in others - {image.name for image in images})
    notes = [f"evaluate.reference: left out, by suffix: {counted(kinds)}"] if kinds else []
    if max_headers is not None and len(images) > max_headers:
        some = f"whether its {len(images):,} images are all of one size is looked at before a run"
        return [*notes, f"evaluate.reference: {some}"]
    require_one_size(reference, images)
    return notes


def unfit_for_reference(reference: str | None, metrics: Sequence[Metric]) -> dict[Metric, str]:
    """Return a line for each metric that cannot hold samples against a folder or file, outside of a job."""
    from graftwork.stages.evaluation.inception import check_reference

    lines = {}
    for metric in metrics:
        if METRICS[metric].reference != "given":
            continue
        accepted = f"with metrics [{metric}], {METRICS[metric].accepted_reference}"
        if reference is None:
            lines[metric] = refusal("reference", "nothing", accepted)
            continue
        try:
            check_reference(reference, [metric])
        except ValueError as error:
            lines[metric] = refusal("reference", error, accepted)
    return lines


def unfit_samples(samples: str, metrics: Sequence[Metric]) -> list[str]:
    """Return a line if a folder or file has no images that metrics can look at."""
    from graftwork.stages.evaluation.inception import images_of, require_enough

    try:
        require_enough(samples, len(images_of(samples, "")), metrics)
    except ValueError as error:
        return [refusal("samples", error, IMAGES)]
    return []


def unfit_inception(weights: str | None) -> list[str]:
    """Return a line if there is no file with Inception weights."""
    if (place := inception_file(weights)).is_file():
        return []
    accepted = f"pytorch-fid's {INCEPTION_FILE}, named by --inception or placed at {inception_file(None)}"
    return [refusal("inception", f"{place}, which does not exist" if weights else "nothing", accepted)]


def absent(job: JobSpec) -> list[str]:
    """A line for each file or folder that the job names and that is not on this machine."""
    lines = []
    if isinstance(job.data, ImageFolderData):
        lines += _absent_data(job.data)
    if isinstance(job.data, CaptionsData) and not are_here(job.data):
        lines.append(f"data.path: got {job.data.path!r}, no such folder or tar; accepted: {ACCEPTED_CAPTIONS}")
    if isinstance(job.data, SyntheticData) and not Path(job.data.prompts).exists():
        lines.append(f"data.prompts: got {job.data.prompts!r}, which does not exist; accepted: a file of prompts")
    lines += [line for field, path in _weights(job) if (line := _absent_weights(field, path))]
    for name, path in _evaluated_with(job):
        if not Path(path).exists():
            lines.append(f"evaluate.{name}: got {path!r}, which does not exist; accepted: a path on this machine")
    absences = (METRICS[metric].absent(job.evaluate) for metric in job.evaluate.metrics)
    return [*lines, *dict.fromkeys(line for of_metric in absences for line in of_metric)]  # of one network, one line


def _with_reference(job: JobSpec) -> list[Metric]:
    """Return the metrics that hold samples against what `evaluate.reference` names."""
    return [metric for metric in job.evaluate.metrics if METRICS[metric].reference == "given"]


def unfetched(job: JobSpec) -> list[str]:
    """Return a line for each hub id that the job names and that is not in the local cache: one of `absent`'s."""
    return [line for field, path in _weights(job) if is_hub_id(path) and (line := _absent_weights(field, path))]


def _absent_data(data: ImageFolderData) -> list[str]:
    accepted = "accepted: a folder with one folder a class"
    if not Path(data.path).is_dir():
        lines = [f"data.path: got {data.path!r}, no such folder; {accepted}"]
        if isinstance(data.classes, str) and not Path(data.classes).exists():
            lines.append(
                f"data.classes: got {data.classes!r}, no such file; accepted: a number, or a file on this machine"
            )
        return lines
    try:
        listing = list_images(data)
    except OSError as error:
        return [f"data.path: got {data.path!r}, which cannot be read ({error.strerror}: {error.filename}); {accepted}"]
    except ValueError:  # of `data.classes`
        return []
    if listing.num_images or listing.nested():
        return []
    kinds = listing.kinds_left_out()
    found = f"no images in class folders, but {counted(kinds)}" if kinds else "no images in it"
    return [f"data.path: got {data.path!r}, {found}; {accepted}"]


def notes(job: JobSpec) -> list[str]:
    """Return lines on what a plan and a run do that the job does not say: files left out, classes without samples, work
    that nothing measures, GPUs that compute without their tensor cores."""
    lines = []
    if isinstance(job.data, ImageFiles) and are_here(job.data):
        listing = read_captions(job.data) if isinstance(job.data, CaptionsData) else list_images(job.data)
        lines = [line] if (line := listing.left_out_line()) else []
    if isinstance(job.data, ImageFolderData) and Path(job.data.path).is_dir():
        lines += _without_heldout(job.data)
    if isinstance(job.data, CaptionsData) and job.data.flip:
        lines.append("data.flip: a mirror image keeps its caption: one that says left or right is then wrong")
    classes, samples = num_classes(job.data) or 0, job.evaluate.samples
    if samples < classes and job.model.told == "classes":
        lines.append(
            f"evaluate.samples: {samples} for {classes:,} classes, spread over them: {classes - samples:,} have none"
        )
    if "kid" in job.evaluate.metrics and samples < KID_SUBSET_IMAGES:
        lines.append(f"evaluate.samples: {samples:,}: kid's subsets have as many at most, not {KID_SUBSET_IMAGES:,}")
    if job.finetune.control and "random_init" not in job.rows():
        lines.append("finetune.control: true, and random_init is not among evaluate.rows: trained, and not measured")
    searched = any(layers.finetune_from == "search" for layers in job.learned().values())
    if job.finetune.control and not _have_parameters(job) and not searched:
        lines.append("finetune.control: true, and no scion has parameters: random_init is stage2 once more")
    return [*lines, *_streaming_memory(job), *_teacher(job), *_without_tensor_cores(job)]


def _streaming_memory(job: JobSpec) -> Iterator[str]:
    """Yield a line on the memory of a first stage that streams."""
    if (parts := streaming_memory(job)) is not None:
        rootstock, scions, sample = map(amount, parts)
        sites = number_of(len(job.edits()), "site")
        held = f"rootstock {rootstock}, scions in training {scions}, and {sample} a sample that passes at once"
        yield f"distill.passes: a task of all {sites} holds about this: {held}"


def _teacher(job: JobSpec) -> Iterator[str]:
    """Yield a line on what a teacher adds to a finetune."""
    if job.finetune.teacher is not None:
        student = TRAINING * graft_flops(job) * job.finetune.batch
        teacher = teacher_flops(job) / job.finetune.steps
        yield (
            f"finetune.teacher: adds {teacher / student:.0%} to the {student / 1e12:.4g} TFLOP of a step, and the "
            "rootstock's weights to the memory of each worker"
        )


def _without_tensor_cores(job: JobSpec) -> list[str]:
    """A line if steps compute in fp32 on GPUs."""
    fields = [field for field, (precision, gpu) in job.precisions().items() if precision == "fp32" and gpu]
    if not fields:
        return []
    return [
        f"fp32 uses no tensor cores of a GPU, and tf32 is up to 8 times as fast: {', '.join(fields)}; accepted there: "
        "tf32, as the published sampling, and bf16"
    ]


def _without_heldout(data: ImageFolderData) -> list[str]:
    """A line if classes have one image each, which stays to train on."""
    folders = class_folders(data)
    single = [name for name, images in folders.items() if not heldout_of(len(images), data.heldout)]
    if not single:
        return []
    return [
        f"data.heldout: {len(single)} of {len(folders)} classes have one image, and none held out: {listed(single)}"
    ]


def fetch(job: JobSpec) -> None:
    """Have every hub id that the job names in the local cache; raises SpecError where one cannot be had."""
    for field, path in _weights(job):
        try:
            local_path(path, _part(field))
        except Exception as error:  # whatever the network, the hub or its library says
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            accepted = "accepted: a file or folder on this machine, or a hub id that can be fetched"
            place = whereabouts(path, _part(field))
            raise SpecError(
                [f"{field}: got {path!r}, {place}, and it cannot be fetched: {reason}; {accepted}"]
            ) from None


def _part(field: str) -> str:
    """Return the folder, in that of a pipeline, that the weights of a field lie in."""
    return {"codec.path": "vae", "text.path": "text_encoder"}.get(field, "transformer")


def paths(job: JobSpec) -> Iterator[tuple[str, str]]:
    """Yield the field and path of all files and folders that the job reads; a hub id is not one."""
    if isinstance(job.data, ImageFiles):
        yield "data.path", job.data.path
    if isinstance(job.data, SyntheticData):
        yield "data.prompts", job.data.prompts
    if isinstance(job.data, ImageFolderData) and isinstance(job.data.classes, str):
        yield "data.classes", job.data.classes
    yield from ((field, path) for field, path in _weights(job) if not is_hub_id(path))
    for name, path in _evaluated_with(job):
        yield f"evaluate.{name}", path


def _evaluated_with(job: JobSpec) -> Iterator[tuple[str, str]]:
    """Yield the files that `evaluate` names, by its fields."""
    evaluate = job.evaluate
    named = {"reference": evaluate.reference, "inception": evaluate.inception, "prompts": evaluate.prompts}
    yield from ((name, path) for name, path in named.items() if path is not None)


def _weights(job: JobSpec) -> Iterator[tuple[str, str]]:
    """The field and path of all weights that the job brings along."""
    if isinstance(job.codec, VaeCodec):
        yield "codec.path", job.codec.path
    if job.text is not None:
        yield "text.path", job.text.path
    if isinstance(job.weights, CheckpointWeights):
        yield "weights.path", job.weights.path
    for number, edit in enumerate(job.graft):
        if isinstance(edit, OperatorEdits) and edit.scions is not None:
            yield f"graft.{number}.scions", edit.scions
    yield from network_paths(job)


def _absent_weights(field: str, path: str) -> str | None:
    if is_hub_id(path):
        place = whereabouts(path, _part(field))
        then = "HF_HUB_OFFLINE keeps a run from fetching it" if is_offline() else "a run asks the hub for it"
        return None if place is None else f"{field}: got {path!r}, {place}; {then}"
    if Path(path).exists():
        return None
    return f"{field}: got {path!r}, no such file; accepted: a file or folder with weights, or a hub id"


def shortages(job: JobSpec) -> list[str]:
    """A line for what the data, the codec or the weights, where they are on this machine, cannot meet."""
    pair = overlapping(carried_edits(job), job.edits())
    pairs = (
        [f"graft: got {pair}; accepted: pairs of blocks that are in no parallel block of the weights"] if pair else []
    )
    data = _data_shortages(job)
    labels = [] if data else _label_shortages(job)
    return [
        *misfits(job.codec, job.data),
        *pairs,
        *unreachable_limits(job),
        *data,
        *labels,
        *text_shortages(job),
        *network_shortages(job),
        *_nothing_to_train(job),
    ]


def _nothing_to_train(job: JobSpec) -> Iterator[str]:
    """Yield a line if a finetune is to train scions alone, and none can have parameters."""
    if job.finetune.train == "scions" and not _have_parameters(job):
        yield "finetune.train: got 'scions', and no operator of graft has parameters; accepted: all, lora"


def _have_parameters(job: JobSpec) -> bool:
    """Return whether any scion that the job may make has parameters."""
    place = job.place()
    return any(scion_cost(edit, place).params for edit in job.edits())


def _label_shortages(job: JobSpec) -> list[str]:
    """Return a line if `weights.classes` names what is not a class of the job."""
    if not isinstance(job.weights, CheckpointWeights) or not isinstance(job.weights.classes, dict):
        return []
    names = class_names(job.data) if are_here(job.data) else ()
    unknown = [name for name in job.weights.classes if name not in names]
    if not names or not unknown:
        return []
    return [f"weights.classes: got {listed(unknown)}; accepted: the job's classes, {listed(names)}"]


def _data_shortages(job: JobSpec) -> list[str]:
    if isinstance(job.data, CaptionsData):
        return _caption_shortages(job, job.data)
    if isinstance(job.data, SyntheticData):
        return _prompt_shortages(job, job.data)
    return _folder_shortages(job, job.data) if isinstance(job.data, ImageFolderData) else _sizes(job)


def _folder_shortages(job: JobSpec, data: ImageFolderData) -> list[str]:
    try:
        listing = list_images(data)
    except OSError:
        return []  # `absent` says so
    except ValueError as misfit:
        return [str(misfit)]
    line = listing.nested() or _empty_classes(job, listing) or _other_classes(data, len(listing.folders))
    if not listing.num_images and not listing.nested():
        return []  # `absent` says so
    return [line] if line else _sizes(job)


def _caption_shortages(job: JobSpec, data: CaptionsData) -> list[str]:
    if not are_here(data):
        return []  # `absent` says so
    try:
        read_captions(data)
    except UnfitCaptions as misfit:
        return [str(misfit)]
    except OSError as error:
        problem = f"which cannot be read ({error.strerror}: {error.filename})"
        return [f"data.path: got {data.path!r}, {problem}; accepted: {ACCEPTED_CAPTIONS}"]
    return _sizes(job)


def _prompt_shortages(job: JobSpec, data: SyntheticData) -> list[str]:
    if not Path(data.prompts).exists():
        return []  # `absent` says so
    try:
        different_prompts(data)
    except ValueError as misfit:
        return [str(misfit)]
    return _sizes(job)


def _empty_classes(job: JobSpec, listing: Listing) -> str | None:
    line = listing.empty()
    if line is None or not isinstance(job.weights, CheckpointWeights):
        return line
    return f"{line}; weights.classes takes the rows of fewer classes from a checkpoint, without empty folders"


def _other_classes(data: ImageFolderData, number: int) -> str | None:
    if not isinstance(data.classes, int) or data.classes == number:
        return None
    return f"data.classes: got {data.classes}; accepted: {number}, the class folders in {data.path}"


def _sizes(job: JobSpec) -> list[str]:
    if line := scarce(job.data, class_sizes(job.data)):
        return [line]
    total, heldout = split_sizes(job.data)
    lines = []
    if heldout < MIN_HELDOUT:
        lines.append(
            f"data.heldout: got {job.data.heldout}, which holds out {heldout} of {sum(class_sizes(job.data))} images, "
            f"one of each class at least staying to train on; accepted: data of which at least {MIN_HELDOUT} are held "
            "out, since the table's first row is their distance"
        )
    if job.distill.samples > total:
        lines.append(
            f"distill.samples: got {job.distill.samples}; accepted: at most {total}, the training images there are"
        )
    if job.distill.heldout is not None and job.distill.heldout > heldout:
        lines.append(
            f"distill.heldout: got {job.distill.heldout}; accepted: at most {heldout}, the held-out images there are"
        )
    return lines
