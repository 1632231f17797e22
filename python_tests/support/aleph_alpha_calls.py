"""Run with an interpreter that has `aleph-alpha-client`: calls a service with it, and prints what came back as JSON.

python aleph_alpha_calls.py http://127.0.0.1:8080 MODEL [TOKEN]
"""

import asyncio
import json
import sys

from aleph_alpha_client import (
    AsyncClient,
    Client,
    ControlTokenOverlap,
    CustomGranularity,
    ExplanationPostprocessing,
    ExplanationRequest,
    Prompt,
    PromptGranularity,
    TargetGranularity,
    Text,
    TextControl,
    Tokens,
)

TEXT, TARGET = "w5 w6 w7 w8 w9 w10", " w20 w21"


def plain(response):
    return [
        [
            explanation.target,
            [[type(item).__name__, [score.score for score in item.scores]] for item in explanation.items],
        ]
        for explanation in response.explanations
    ]


def requests():
    text = Prompt.from_text(TEXT)
    yield "defaults", ExplanationRequest(text, TARGET)
    for granularity in PromptGranularity:
        yield granularity.value, ExplanationRequest(text, TARGET, prompt_granularity=granularity)
    yield "delimiter", ExplanationRequest(text, TARGET, prompt_granularity=CustomGranularity(" w7 "))
    yield "target tokens", ExplanationRequest(text, TARGET, target_granularity=TargetGranularity.Token)
    yield (
        "every control",
        ExplanationRequest(
            Prompt([Text(TEXT, [TextControl(3, 5, 0.25, ControlTokenOverlap.Complete)])]),
            TARGET,
            contextual_control_threshold=0.5,
            control_factor=0.3,
            control_token_overlap=ControlTokenOverlap.Partial,
            control_log_additive=False,
            postprocessing=ExplanationPostprocessing.Square,
            normalize=True,
        ),
    )
    yield "token ids", ExplanationRequest(Prompt([Tokens([5, 6, 7], []), Text.from_text(" w8")]), TARGET)


async def at_once(url, model, token):
    async with AsyncClient(token, host=url) as client:
        await client.validate_version()
        return await asyncio.gather(
            *(
                client.explain(ExplanationRequest(Prompt.from_text(f"w{n} w6 w7"), TARGET), model=model)
                for n in range(5, 25)
            )
        )


def main(url, model, token="none"):
    client = Client(token, host=url)
    client.validate_version()
    found = {name: plain(client.explain(request, model=model)) for name, request in requests()}
    found["with text"] = [
        score.text
        for score in client.explain(ExplanationRequest(Prompt.from_text(TEXT), TARGET), model=model)
        .with_text_from_prompt(ExplanationRequest(Prompt.from_text(TEXT), TARGET))
        .explanations[0]
        .items[0]
        .scores
    ]
    found["at once"] = [plain(each) for each in asyncio.run(at_once(url, model, token))]
    try:
        client.explain(ExplanationRequest(Prompt.from_text(TEXT), ""), model=model)
    except ValueError as error:
        found["wrong"] = str(error)
    try:
        Client("another token", host=url).explain(ExplanationRequest(Prompt.from_text(TEXT), TARGET), model=model)
    except PermissionError as error:
        found["no token"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
