"""What routes take from a request: the engine, and the model that answers."""

from typing import Annotated

from fastapi import Depends, Query, Request

from serve import parameters
from serve.engine import Engine
from serve.loading import LoadedModel

CURRENT = "current"  # in a path, the current model: its name changes with each swap


async def get_engine(request: Request) -> Engine:
    return request.app.state.engine


CurrentEngine = Annotated[Engine, Depends(get_engine)]
Name = Annotated[str | None, Query(description="a saved model; by default the current one")]
Top = Annotated[int, Query(ge=1, description="number of most likely classes to list")]
View = Annotated[bool, Query(description="whether to return the model's input")]


async def choose_model(request: Request, engine: CurrentEngine, model: Name = None) -> LoadedModel:
    """The model of the request, after a check of the URL; `?model=` is the current one."""
    parameters.check_query(request)
    return await engine.choose_model(model or None)


async def choose_named_model(request: Request, engine: CurrentEngine) -> LoadedModel:
    """The same for a route whose path names the model."""
    parameters.check_query(request)
    name = request.path_params["name"]
    return await engine.choose_model(None if name == CURRENT else name)


ChosenModel = Annotated[LoadedModel, Depends(choose_model)]
NamedModel = Annotated[LoadedModel, Depends(choose_named_model)]
