"""What a client may ask for. Sizes and lengths are checked against the model in `serving.plan`; here only what is never right."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_PROMPT_CHARS = 5000
MAX_SEED = 2**31 - 1

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT_CHARS)]
Picture = Annotated[str, StringConstraints(min_length=1, max_length=30_000_000)]


class GenerateRequest(BaseModel):
    """One video or image to make."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {"prompt": "A medium-sized red disc moves to the left over a white background.", "seed": 7},
                {"prompt": "A lighthouse in a storm", "kind": "image", "style": "painting", "wait": True},
            ]
        },
    )

    prompt: Text = Field(description="What to show.")
    negative_prompt: Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)] = Field(
        "", description="What to keep away from, beside the model's own list of unwanted qualities."
    )
    kind: Literal["video", "image"] = Field("video", description="A video (MP4) or a still image (PNG).")
    size: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{1,4}x[1-9][0-9]{1,4}$")] | None = Field(
        None, description="WIDTHxHEIGHT of the result in px, for example 1920x1080; the model's own by default."
    )
    seconds: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] | None = Field(
        None, description="Length of a video; the model's own by default."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="The same request with the same seed makes the same file; drawn where it is left out, and echoed."
    )
    style: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="A style the model was trained with; its words are put before the prompt (`GET /capabilities`)."
    )
    rewrite: bool = Field(True, description="Enrich the prompt so that it reads like the captions of the training set.")
    refine: bool | None = Field(None, description="Sharpen with the refiner; by default wherever the server has one.")
    steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Denoising steps of the base model.")
    guidance_scale: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] | None = Field(
        None, description="How strongly the prompt is followed; 1 is not at all beyond the model's own word."
    )
    first_frame: Picture | None = Field(
        None, description="Picture to begin with (image-to-video): base64, a data URL, or a URL of an allowed host."
    )
    last_frame: Picture | None = Field(
        None, description="Picture to end with; with `first_frame` the video leads from one to the other."
    )
    priority: Literal["low", "normal", "high"] = Field("normal", description="Higher ones are begun first.")
    wait: bool = Field(False, description="Answer with the file once it is there, instead of with a job.")
    webhook_url: Annotated[str, StringConstraints(max_length=2000)] | None = Field(
        None, description="Called with the job when it has ended; its host must be allowed."
    )
