"""Check the folders of a sweep's jobs and let a search resume, before the first job starts."""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from haq_lab.utils.errors import UserError

SEED = 0  # of a search without a seed


def refuse_shared_folders(config: DictConfig) -> None:
    """Check that two jobs of a sweep never share a folder, unless their overrides are equal.

    Args:
        config: The config of the sweep, with the node `hydra`.

    Raises:
        UserError: Two jobs would share a folder, or this cannot be excluded for a search.
    """
    sweep = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    pattern = f"{sweep['dir']}/{sweep['subdir']}".replace("${hydra:", "${hydra.")  # type: ignore[index, call-overload]
    loader = GlobalHydra.instance().config_loader()
    overrides = _overrides(config)
    swept = _swept(overrides)
    if not swept or "hydra.job.num" in pattern or "hydra.job.id" in pattern:
        return
    if "hydra.job.override_dirname" in pattern:
        for name in set(swept) & set(config.hydra.job.config.override_dirname.exclude_keys):
            raise UserError(
                f"{name}: a sweep over it would run several jobs in one folder, because it does not change the "
                "results. Give it one value."
            )
        return
    if not config.hydra.sweeper._target_.endswith(BasicSweeper.__name__):
        raise UserError(_message(config, "may give two jobs of a search the same folder"))
    jobs_by_folder: dict[str, list[str]] = {}
    for job in BasicSweeper.split_arguments(overrides, None)[0]:
        folder = _folder(loader.load_sweep_config(config, [*job]))
        other = jobs_by_folder.setdefault(folder, [*job])
        if other != [*job]:
            first, second = (" ".join(sorted(set(one) - set(two))) for one, two in ((other, job), (job, other)))
            raise UserError(_message(config, f"is the same for the jobs '{first}' and '{second}'"))


def swept_settings(config: DictConfig) -> list[str]:
    """Return the names of the settings and groups that have several values in a sweep.

    Args:
        config: The config of the sweep, with the node `hydra`.
    """
    return _swept(_overrides(config))


def _swept(overrides: list[Override]) -> list[str]:
    return [override.key_or_group for override in overrides if override.is_sweep_override()]


def _overrides(config: DictConfig) -> list[Override]:
    """Return the overrides of a sweep: those of its experiment, and those of the command line."""
    params = [f"{name}={values}" for name, values in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return parser.parse_overrides([*params, *config.hydra.overrides.task])


def _folder(job_config: DictConfig) -> str:
    """Return the folder of a job, with all interpolations resolved."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(job_config)  # the resolver `hydra` reads it
    try:
        return f"{job_config.hydra.sweep.dir}/{job_config.hydra.sweep.subdir}"
    finally:
        HydraConfig.instance().cfg = before


def _message(config: DictConfig, fault: str) -> str:
    subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index, call-overload]
    return f"hydra.sweep.subdir: '{subdir}' {fault}. Remove the setting, or add '${{hydra.job.num}}'."


def resume_search(config: DictConfig) -> None:
    """Let the same command resume a search (`hydra/sweeper=search`) instead of starting another one.

    Without a stored study, the sampler gets a fixed seed. So the same command draws the same trials, and the finished
    ones are not run again. With a stored study (`hydra.sweeper.storage` and `hydra.sweeper.study_name`), `n_trials`
    becomes the number of trials that the study still lacks.

    Args:
        config: The config of the sweep, with the node `hydra`. It is changed.
    """
    sweeper = config.hydra.sweeper
    if "sampler" not in sweeper:
        return
    with read_write(config), open_dict(config):
        if sweeper.storage and sweeper.study_name:
            sweeper.n_trials = max(0, sweeper.n_trials - _completed_trials(sweeper))
        elif "seed" in sweeper.sampler and sweeper.sampler.seed is None:
            sweeper.sampler.seed = SEED


def _completed_trials(sweeper: DictConfig) -> int:
    """Return how many trials of the stored study are finished. 0 if the study cannot be opened."""
    import optuna

    try:
        trials = optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage).trials
    except Exception:  # there is no such study yet; the sweeper reports all other errors when it opens the storage
        return 0
    return sum(trial.state is optuna.trial.TrialState.COMPLETE for trial in trials)
