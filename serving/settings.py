"""pipelines.yaml `serving:` -> `Settings`. Every key is documented here; unknown ones are errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from waver_core.config import Config, Strict, validate


class Tiles(Strict):
    """Decoding and encoding in parts, so that memory does not grow with length and size (`waver_core.tiling`)."""

    side_px: int = Field(640, ge=64, multiple_of=16)
    """Side of a tile; frames that are no larger stay whole."""
    overlap_px: int = Field(128, ge=16, multiple_of=16)
    """Neighbouring tiles share so much and are blended over it."""
    latent_frames: int = Field(8, ge=2)
    """Latent frames of one part in time. Exact for the DCT codec; the Wan VAE remembers dozens of frames, so it is given all of
    them (61 for 10 s at 24 fps) and works through them by itself, four pixel frames at a time."""
    context_latent_frames: int = Field(3, ge=1)
    """Latent frames before a part that are decoded for its sake and thrown away."""

    @model_validator(mode="after")
    def _fits(self) -> Tiles:
        if 2 * self.overlap_px > self.side_px:
            raise ValueError(f"overlap_px {self.overlap_px} is more than half of side_px {self.side_px}")
        return self


class Cascade(Strict):
    """Which checkpoints are served, and how they sample. None takes what the checkpoint's recipe says."""

    base: str | None = None
    """Folder of the base model's export. The app does not start without it."""
    refiner: str | None = None
    """Folder of the refiner's export; None serves the base model alone."""
    upscale: float = Field(1.5, ge=1)
    """The refiner's size over the base model's: 720p -> 1080p (Waver §2.2)."""
    steps: int | None = Field(None, ge=1)
    refiner_steps: int | None = Field(None, ge=1)
    """None: half of the base model's."""
    shift: float | None = Field(None, gt=0)
    guidance_scale: float | None = Field(None, ge=1)
    norm_threshold: float | None = Field(None, ge=0)
    noise_weight: float | None = Field(None, ge=0, le=1)
    """Share of noise that the refiner starts with; None takes the middle of what it was trained with."""
    min_seconds: float = Field(2.0, gt=0)
    max_seconds: float = Field(10.0, gt=0)
    max_steps: int = Field(100, ge=1)
    max_guidance_scale: float = Field(20.0, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the networks' weights."""
    tiles: Tiles = Tiles()
    crf: int = Field(18, ge=0, le=51)
    """Quality of the H.264 file; smaller is better."""

    @model_validator(mode="after")
    def _lengths(self) -> Cascade:
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds:g} is above max_seconds {self.max_seconds:g}")
        return self


class Rewriting(Strict):
    """Prompt rewriting (Waver §4.6)."""

    backend: str | None = "template"
    """A `prompt_rewriter`; None leaves prompts as they are."""
    options: dict[str, Any] = {}
    timeout_s: float = Field(20.0, gt=0)
    max_chars: int = Field(2000, ge=50)
    """A longer answer is refused, and the original prompt used."""


class Storage(Strict):
    """Where jobs and their files are kept."""

    database: str | None = None
    """SQLAlchemy URL, for example postgresql+psycopg://user@host/waver; None: SQLite in `folder`."""
    folder: str = "out/serving"
    """Inputs, previews and results, one folder a job, on a local or mounted file system that all nodes share."""
    keep_hours: float = Field(24.0, gt=0)
    """Results are deleted after this; their jobs become `expired`."""
    forget_days: float = Field(30.0, gt=0)
    """Rows of finished jobs are deleted after this."""


class Queue(Strict):
    """How jobs wait, run, are retried and given up."""

    max_queued: int = Field(64, ge=1)
    """More waiting jobs than this are refused with 429."""
    running: int = Field(2, ge=1)
    """Jobs in progress at once: while one is refined, the next is in the base model."""
    max_attempts: int = Field(3, ge=1)
    """Times a job is begun where workers die under it."""
    max_wait_s: float = Field(3600.0, gt=0)
    """A job that waited longer fails with `queue_timeout`."""
    max_run_s: float = Field(3600.0, gt=0)
    """A job that has been computed for longer fails with `timeout`; waiting for a free replica does not count."""
    lease_s: float = Field(5.0, gt=0)
    """A job whose dispatcher has been silent for so long goes back to the queue."""
    poll_s: float = Field(0.1, gt=0)
    """How often a dispatcher looks for jobs that nobody has told it of."""


class Http(Strict):
    """What is let in."""

    api_keys: str | None = None
    """YAML file of keys and their limits (see docs/serving.md). Without it only this machine itself may ask."""
    max_body_mb: float = Field(32.0, gt=0)
    max_image_mb: float = Field(16.0, gt=0)
    max_image_px: int = Field(16_000_000, ge=1)
    """Pixels of a given frame, looked up in its header before it is decoded."""
    url_hosts: tuple[str, ...] = ()
    """Hosts that given frames may be fetched from; none by default."""
    webhook_hosts: tuple[str, ...] = ()
    """Hosts that may be called when a job ends; none by default. A name listed here may be private."""
    webhook_secret_env: str = "WAVER_WEBHOOK_SECRET"
    """Name of the environment variable with the key of the HMAC signature."""
    webhook_attempts: int = Field(6, ge=1)
    max_wait_s: float = Field(1800.0, gt=0)
    """`wait=true` answers with the job (202) after this."""


class Deployment(Strict):
    """Replicas of one deployment and what each reserves."""

    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    """With this, Ray Serve adds replicas up to so many while requests wait."""
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    ranks: int = Field(1, ge=1)
    """Processes (GPUs) that compute one sample together; base and refiner only. `cpus` and `gpus` are then each rank's."""
    cfg_parallel: bool = False
    """Half of the ranks compute the prompt, half the negative prompt; base only."""
    step_timeout_s: float = Field(600.0, gt=0)
    """A group of ranks that makes no step for so long is taken down and built anew, a replica of one process replaced."""
    build_timeout_s: float = Field(1800.0, gt=0)
    """A group of ranks that is not there after this, weights loaded, is given up and its replica replaced."""
    threads: int | None = Field(None, ge=1)
    """Threads of torch in each process; None takes what `cpus` says, at least one."""

    @model_validator(mode="after")
    def _fits(self) -> Deployment:
        if self.cfg_parallel and self.ranks % 2:
            raise ValueError(f"cfg_parallel halves the ranks: {self.ranks} cannot be halved")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below replicas {self.replicas}")
        return self


class Deployments(Strict):
    """The parts that scale and are placed by themselves."""

    http: Deployment = Deployment(cpus=0.1)
    dispatcher: Deployment = Deployment(cpus=0.1)
    rewriter: Deployment = Deployment(cpus=0.1)
    text: Deployment = Deployment()
    base: Deployment = Deployment()
    refiner: Deployment = Deployment()
    autoencoder: Deployment = Deployment()


class Settings(Strict):
    """All of `serving:`."""

    cascade: Cascade = Cascade()
    rewriting: Rewriting = Rewriting()
    storage: Storage = Storage()
    queue: Queue = Queue()
    http: Http = Http()
    deployments: Deployments = Deployments()
    styles: dict[str, str] = {}
    """A style that a request may name -> the words put before its prompt; pipelines.yaml has them in `tags.style`."""

    @property
    def database_url(self) -> str:
        """The job store's SQLAlchemy URL."""
        return self.storage.database or f"sqlite:///{self.storage.folder.rstrip('/')}/jobs.sqlite"


def load_settings(config: Config) -> Settings:
    """`serving:` of a configuration with the style tags; raises `ConfigError` that names the key."""
    settings: Settings = validate(Settings, {**config.serving, "styles": config.tags.style}, "serving")
    return settings
