"""What learns in a config of kohya's sd-scripts: networks.lora, LyCORIS, the whole model, new words."""

from typing import Any

from sdxl_trainer.arrivals import common
from sdxl_trainer.arrivals.account import Account, pairs
from sdxl_trainer.errors import UserError, closest, plural

# Regular expressions over our layers, for what the networks there put adapters on.
ATTENTION = r"unet\..*\.attn[12]\..*"
TRANSFORMERS = r"unet\..*\.attentions\..*"
BLOCKS = r"unet\..*\.(attentions|resnets|downsamplers|upsamplers)\..*"
CONVOLUTIONS = r"unet\..*\.(resnets|downsamplers|upsamplers)\..*"
TEXT = r"text_encoder(_2)?\..*\.layers\..*"
_PRESETS = {
    "full": BLOCKS,
    "full-lin": BLOCKS,
    "attn-mlp": TRANSFORMERS,
    "attn-only": ATTENTION,
    "unet-only": BLOCKS,
    "unet-transformer-only": TRANSFORMERS,
    "unet-convblock-only": CONVOLUTIONS,
}
_ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "boft": "boft"}
_ALGORITHMS |= {"oft": "oft", "diag-oft": "oft", "diag_oft": "oft"}
_MODULES = {"networks.lora": "lora", "networks.loha": "loha", "networks.lokr": "lokr", "networks.oft": "oft"}
_MODULES |= {"networks.lora_fa": "lora"}
_ARGUMENTS = {
    "rank_dropout": "no dropout of ranks",
    "module_dropout": "no dropout of whole layers",
    "rank_dropout_scale": "no dropout of ranks",
    "use_tucker": "convolutions are factored in two, not in Tucker's three",
    "use_cp": "convolutions are factored in two, not in Tucker's three",
    "use_conv_cp": "convolutions are factored in two, not in Tucker's three",
    "use_scalar": "no learned scale for each layer",
    "train_norm": "norms stay as they are",
    "decompose_both": "the first of LoKr's factors is whole",
    "factor": "of LoKr alone",
    "full_matrix": "of LoKr alone",
    "constraint": "rotations are not constrained",
    "constrain": "rotations are not constrained",
    "rescaled": "no learned scale beside the rotation",
    "bypass_mode": "how the sum is computed is decided here",
    "wd_on_output": "DoRA's lengths are of the outputs",
    "unbalanced_factorization": "the first of LoKr's factors has the smaller part of both sides",
    "dropout": "see network_dropout",
    "block_lr_zero_threshold": "a rate of 0 leaves a block as it is",
    "verbose": "sdxl check shows what learns",
}
# kohya's 23 parts of the UNet (--block_lr), as parameters of ours.
UNET_BLOCKS = [
    r"unet\.(time_embedding|add_embedding)\..*",
    r"unet\.conv_in\..*",
    r"unet\.down_blocks\.0\.resnets\.0\..*",
    r"unet\.down_blocks\.0\.resnets\.1\..*",
    r"unet\.down_blocks\.0\.downsamplers\..*",
    r"unet\.down_blocks\.1\.(resnets|attentions)\.0\..*",
    r"unet\.down_blocks\.1\.(resnets|attentions)\.1\..*",
    r"unet\.down_blocks\.1\.downsamplers\..*",
    r"unet\.down_blocks\.2\.(resnets|attentions)\.0\..*",
    r"unet\.down_blocks\.2\.(resnets|attentions)\.1\..*",
    r"unet\.mid_block\.resnets\.0\..*",
    r"unet\.mid_block\.attentions\.0\..*",
    r"unet\.mid_block\.resnets\.1\..*",
    r"unet\.up_blocks\.0\.(resnets|attentions)\.0\..*",
    r"unet\.up_blocks\.0\.(resnets|attentions)\.1\..*",
    r"unet\.up_blocks\.0\.((resnets|attentions)\.2|upsamplers)\..*",
    r"unet\.up_blocks\.1\.(resnets|attentions)\.0\..*",
    r"unet\.up_blocks\.1\.(resnets|attentions)\.1\..*",
    r"unet\.up_blocks\.1\.((resnets|attentions)\.2|upsamplers)\..*",
    r"unet\.up_blocks\.2\.resnets\.0\..*",
    r"unet\.up_blocks\.2\.resnets\.1\..*",
    r"unet\.up_blocks\.2\.resnets\.2\..*",
    r"unet\.conv_(norm_)?out\..*",
]
Rates = dict[str, float]


def learns(account: Account, script: str, rate: float) -> None:
    """What learns and how fast; `rate` is the base rate."""
    if account.has("network_module"):
        _network(account, rate)
    elif "textual_inversion" in script or account.has("token_string"):
        _words(account)
    else:
        _whole(account, rate)


def _network(account: Account, rate: float) -> None:
    module = account.text("network_module")
    given = account.options.pop("network_args", None)
    arguments = account.inner(pairs(given, account.where), "network_args")
    kind = _kind(account, arguments, module)
    if kind == "full":
        account.part("network_module", "the whole model learns")
        arguments.dropped("algo", "the whole model is written, not its difference")
        arguments.drop_all(
            _ARGUMENTS | {"preset": "all of the UNet", "conv_dim": "no adapter", "conv_alpha": "no adapter"}
        )
        arguments.finish()
        account.drop_all({name: "no adapter" for name in ("network_dim", "network_alpha", "network_dropout")})
        _whole(account, rate)
        return
    account.kept("network_module", "adapter.kind", kind)
    parts = _parts(account)
    account.put("adapter.parts", parts)
    _ranks(account, arguments, kind)
    _targets(arguments, account, module, parts)
    if kind == "lokr":
        common.kronecker(account, arguments)
    if account.has("network_dropout") and kind in {"lora", "dora"}:
        account.kept("network_dropout", "adapter.dropout", float(account.number("network_dropout")))
    _rates(account, arguments, parts, rate, kind)
    if account.has("network_weights"):
        account.kept("network_weights", "adapter.start", account.text("network_weights"))
    account.drop_all(
        {
            "network_dropout": "this kind has no dropout here",
            "dim_from_weights": "ranks must be those of the file: set adapter.rank",
            "scale_weight_norms": "no limit of the norm of the adapter's weights",
            "base_weights": "merge them into the base before: sdxl convert BASE NEW --lora FILE=WEIGHT",
            "base_weights_multiplier": "merge them into the base before: sdxl convert BASE NEW --lora FILE=WEIGHT",
        }
    )
    arguments.drop_all(_ARGUMENTS)
    arguments.finish()


def _kind(account: Account, arguments: Account, module: str) -> str:
    """The kind of adapter, or full."""
    if module.startswith("lycoris"):
        algorithm = arguments.text("algo", "lora").lower()
        if algorithm == "full":
            return "full"
        if algorithm not in _ALGORITHMS:
            what = f"the algorithm '{algorithm}' of LyCORIS is not available here"
            raise UserError(what, account.where, closest(algorithm, _ALGORITHMS))
        kind = _ALGORITHMS[algorithm]
        arguments.part("algo", "adapter.kind")
        if kind == "lora" and arguments.look("dora_wd"):
            arguments.part("dora_wd", "adapter.kind = dora")
            return "dora"
        if arguments.has("dora_wd"):
            arguments.dropped("dora_wd", f"{kind} without the lengths of the rows")
        return kind
    if module not in _MODULES:
        what = f"the network '{module}' is not available here"
        raise UserError(what, account.where, closest(module, [*_MODULES, "lycoris.kohya"]))
    if module == "networks.lora_fa":
        account.assumed("adapter.kind", "lora", "LoRA-FA's A learns too")
    return _MODULES[module]


def _parts(account: Account) -> list[str]:
    """The models that get adapters: all three, unless told otherwise."""
    if account.look("network_train_unet_only"):
        account.kept("network_train_unet_only", "adapter.parts", ["unet"])
        return ["unet"]
    if account.look("network_train_text_encoder_only"):
        account.kept("network_train_text_encoder_only", "adapter.parts", ["text_encoder", "text_encoder_2"])
        return ["text_encoder", "text_encoder_2"]
    rates = _text_rates(account)
    parts = ["unet", "text_encoder", "text_encoder_2"]
    if rates:
        parts = ["unet", *(part for part, own in zip(parts[1:], rates, strict=True) if own > 0)]
    account.assumed("adapter.parts", parts, "text encoders learn there unless network_train_unet_only is given")
    return parts


def _text_rates(account: Account) -> list[float]:
    """The rates of both text encoders, if any are given."""
    given = account.options.get("text_encoder_lr")
    if given in (None, "", []):
        return []
    words = given if isinstance(given, list) else str(given).replace(",", " ").split()
    try:
        numbers = [float(word) for word in words]
    except (TypeError, ValueError):
        raise UserError(f"text_encoder_lr = {given!r} is not a number", account.where, "correct it there") from None
    return [numbers[0], numbers[-1]]


def _ranks(account: Account, arguments: Account, kind: str) -> None:
    if kind in {"oft", "boft"}:
        account.drop_all(
            {name: "rotations have blocks of adapter.block_size" for name in ("network_dim", "network_alpha")}
        )
        if kind == "boft" and arguments.has("block_size"):
            arguments.kept("block_size", "adapter.block_size")
        arguments.drop_all(dict.fromkeys(("conv_dim", "conv_alpha", "block_size"), "rotations have no rank"))
        return
    for name, option, default in (("network_dim", "rank", 4), ("network_alpha", "alpha", 1.0)):
        if account.has(name):
            kind_of = int if option == "rank" else float
            account.kept(name, f"adapter.{option}", kind_of(account.number(name)))
        else:
            account.options.pop(name, None)
            account.assumed(f"adapter.{option}", default, f"the default of {name}")
    if arguments.look("rs_lora"):
        arguments.kept("rs_lora", "adapter.rslora", True)
    _ranks_of_blocks(arguments)


def _ranks_of_blocks(arguments: Account) -> None:
    """Ranks and alphas of the 23 blocks; those without attention get no adapter."""
    for name, option, kind in (("block_dims", "ranks", int), ("block_alphas", "alphas", float)):
        if not arguments.has(name):
            continue
        given = arguments.look(name)
        values = [kind(value) for value in (given if isinstance(given, list) else str(given).split(","))]
        if len(values) != len(UNET_BLOCKS):
            what = f"network_args.{name} has {plural(len(values), 'value')}, and the UNet {len(UNET_BLOCKS)} blocks"
            raise UserError(what, arguments.where, "give one for each")
        table = {m: v for m, v in zip(UNET_BLOCKS, values, strict=True) if "attentions" in m}
        if min(table.values()) <= 0:
            arguments.dropped(name, "blocks of rank 0 are left out by adapter.targets here: name the others there")
        else:
            arguments.kept(name, f"adapter.{option}", table)


def _targets(arguments: Account, account: Account, module: str, parts: list[str]) -> None:
    """The layers that get an adapter, and ranks of convolutions."""
    lycoris = module.startswith("lycoris")
    chosen = TRANSFORMERS
    if lycoris:
        preset = arguments.text("preset", "full")
        if preset in _PRESETS:
            chosen = _PRESETS[preset]
            arguments.part("preset", "adapter.targets")
        else:
            chosen = BLOCKS
            arguments.dropped("preset", "files of presets are not read: all layers of the UNet's blocks")
    conv = arguments.number("conv_dim")
    if conv:
        chosen = BLOCKS if chosen == TRANSFORMERS else chosen
        rotates = account.tree["adapter"]["kind"] in {"oft", "boft"}
        if not rotates:
            arguments.kept("conv_dim", "adapter.conv_rank", int(conv))
            alpha = arguments.number("conv_alpha", account.tree["adapter"]["alpha"] if lycoris else 1.0)
            arguments.put("adapter.conv_alpha", float(alpha))
            arguments.part("conv_alpha", "adapter.conv_alpha")
    arguments.drop_all({name: "" for name in ("conv_dim", "conv_alpha") if not arguments.has(name)})
    arguments.drop_all(dict.fromkeys(("conv_dim", "conv_alpha"), "convolutions get no adapter"))
    wanted = [chosen] * ("unet" in parts) + [TEXT] * (len(parts) > ("unet" in parts))
    account.put("adapter.targets", wanted[0] if len(wanted) == 1 else f"({'|'.join(wanted)})")


def _rates(account: Account, arguments: Account, parts: list[str], rate: float, kind: str) -> None:
    """Rates of the parts, and LoRA+."""
    unet = account.number("unet_lr", rate)
    text = _text_rates(account) or [rate, rate]
    own: Rates = {"unet": unet, "text_encoder": text[0], "text_encoder_2": text[1]}
    own = {part: own[part] for part in parts}
    ratios = (
        {part: _ratio(arguments, part) for part in parts} if kind in {"lora", "dora"} else dict.fromkeys(parts, 1.0)
    )
    if len(set(own.values())) == 1 and set(ratios.values()) == {1.0}:
        account.put("train.learning_rate", float(next(iter(own.values()))))
    else:
        rules: list[dict[str, Any]] = []
        for part, value in own.items():
            if ratios[part] != 1.0:
                match = rf"{part}\..*\.lora_B\..*"
                rules.append({"match": match, "learning_rate": float(value * ratios[part])})
            rules.append({"match": rf"{part}\..*", "learning_rate": float(value)})
        account.tree["learn"] = rules
    account.part("unet_lr", "the rate of the UNet")
    account.part("text_encoder_lr", "the rates of the text encoders")
    for name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"):
        arguments.part(name, "learn: lora_B learns that much faster")


def _ratio(arguments: Account, part: str) -> float:
    own = "loraplus_unet_lr_ratio" if part == "unet" else "loraplus_text_encoder_lr_ratio"
    return float(arguments.number(own) or arguments.number("loraplus_lr_ratio") or 1.0)


def _whole(account: Account, rate: float) -> None:
    """The UNet, by blocks if asked for, and the text encoders."""
    rules: list[dict[str, Any]] = []
    if account.has("block_lr"):
        given = account.options["block_lr"]
        rates = [float(word) for word in (given if isinstance(given, list) else str(given).split(","))]
        if len(rates) != len(UNET_BLOCKS):
            what = f"block_lr has {plural(len(rates), 'rate')}, and the UNet {len(UNET_BLOCKS)} blocks"
            raise UserError(what, account.where, "give one for each")
        rules += [{"match": m, "learning_rate": r} for m, r in zip(UNET_BLOCKS, rates, strict=True)]
        account.part("block_lr", "learn, a rule for each block")
    if account.look("train_text_encoder"):
        rules = rules or [{"match": r"unet\..*", "learning_rate": rate}]
        for part, name in (("text_encoder", "learning_rate_te1"), ("text_encoder_2", "learning_rate_te2")):
            rules.append({"match": rf"{part}\..*", "learning_rate": float(account.number(name, rate))})
            account.part(name, f"learn, the rule for {part}")
        account.part("train_text_encoder", "learn, rules for both text encoders")
    if rules:
        account.tree["learn"] = [rule for rule in rules if rule["learning_rate"] > 0]
    names = ("learning_rate_te1", "learning_rate_te2", "unet_lr", "text_encoder_lr", "network_train_unet_only")
    account.drop_all(dict.fromkeys(names, "the text encoders stay as they are, and the UNet has learning_rate"))


def _words(account: Account) -> None:
    """Textual inversion."""
    account.kept("token_string", "token.0.name", account.text("token_string"))
    vectors = "num_vectors_per_token"
    if account.has(vectors):
        account.kept(vectors, "token.0.vectors", int(account.number(vectors)))
    if account.has("init_word"):
        account.kept("init_word", "token.0.init", account.text("init_word"))
    if account.has("weights"):
        account.kept("weights", "token.0.start", account.text("weights"))
    account.drop_all(
        {name: "captions stay as they are" for name in ("use_object_template", "use_style_template", "use_templates")}
    )
