"""Networks that are adapted apart and tested as one."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from cli import main
from maml_lightning import MAML, SettingError
from maml_lightning.trained import packaged
from maml_lightning.training.ensembles import Ensemble, mean_outputs
from maml_lightning.training.scores import Score, Scoring
from tests.reference import images
from tests.runs import DATA, SINUSOIDS, TINY, words
from tests.structures import CASES, episode_of

pytestmark = pytest.mark.usefixtures("folder")


def network(**settings):
    net = nn.Sequential(nn.Flatten(), nn.Linear(100, 3)).double()
    return MAML(net, **{"inner_lr": 0.3, **settings}).double()


def test_probabilities_of_networks_adapted_apart_are_averaged():
    one, two, episode = network(), network(inner_lr=0.1, eval_inner_steps=3, meta_curvature=True), images()
    ensemble = Ensemble({"one": one, "two": two})
    ensemble.scoring = Scoring(F.cross_entropy, Score("accuracy", 1))
    path = ensemble.trajectory(episode)
    first, second = one.trajectory(episode), two.trajectory(episode)
    assert len(path) == 4
    for k, mean in enumerate(path):  # the first takes one step, and stays as it is then
        expected = (first[min(k, 1)].softmax(-1) + second[k].softmax(-1)) / 2
        assert torch.allclose(mean.exp(), expected, rtol=1e-12)
        loss = F.cross_entropy(mean[0], episode.query_targets[0])
        assert torch.allclose(loss, F.nll_loss(expected[0].log(), episode.query_targets[0]), rtol=1e-9)


def test_losses_of_several_tensors_have_no_mean():
    case = CASES["heads"]
    ensemble = Ensemble({"two": MAML(case.net(), loss=case.loss)})
    ensemble.trainer = Trainer(logger=False)
    with pytest.raises(SettingError, match="ensemble two: its loss takes several tensors of the network, of which"):
        ensemble._check(episode_of(case))


def test_the_mean_of_each_kind_of_prediction():
    outputs = [torch.randn(2, 4, 3, 5, dtype=torch.float64) for _ in range(3)]
    pixels = mean_outputs(outputs, Score("accuracy", 1))
    assert torch.allclose(pixels.exp(), sum(output.softmax(2) for output in outputs) / 3)
    logit = mean_outputs(outputs, Score("accuracy"))
    assert torch.allclose(logit.sigmoid(), sum(output.sigmoid() for output in outputs) / 3)
    assert torch.allclose(mean_outputs(outputs, Score("mse")), sum(outputs) / 3)
    sure = torch.tensor([[[1000.0, 0.0]]], dtype=torch.bfloat16)
    assert mean_outputs([sure, sure], Score("accuracy", 1)).isfinite().all()
    assert mean_outputs([sure, sure], Score("accuracy")).isfinite().all()
    assert mean_outputs([sure, sure], Score("accuracy", 1)).dtype == torch.float32


def fit(folder, base=TINY, **flags):
    main(words("fit", **{**base, "trainer.default_root_dir": folder, **flags}))
    return next(Path(folder).rglob("best.ckpt"))


def results(cli):
    return json.loads((Path(cli.trainer.log_dir) / "test_results.json").read_text())


def test_an_ensemble_is_tested_from_the_command_line(caplog):
    one = fit("one", **{"model.meta_curvature": "true", "model.learn_inner_lr": "step"})
    two = fit("two", **{"model.inner_lr": 0.1, "seed_everything": 1, "model.net.hidden_channels": 6})
    with caplog.at_level("INFO"):
        found = results(main([*words("test", **DATA), "--ensemble", str(one), str(two)]))
    assert "Test accuracy of an ensemble of 2 networks after 2 inner steps: " in caplog.text
    assert "the weights are untrained" not in caplog.text
    assert found["ensemble"] == [str(one), str(two)]
    assert found["checkpoint"] is None
    assert (found["episodes"], found["inner_steps"], found["ways"]) == (12, 2, 3)

    cli = main([*words("test", **DATA, **{"model.eval_inner_steps": 4}), "--ensemble", str(one), str(two)])
    members = [MAML.load_from_checkpoint(path, eval_inner_steps=4).eval() for path in (one, two)]
    data = cli.datamodule.datasets["test"]
    right = []
    for index in range(12):
        episode = data[index]
        mean = sum(member.trajectory(episode)[-1].softmax(-1) for member in members)
        right.append((mean.argmax(-1) == episode.query_targets).double().mean())
    assert results(cli)["accuracy"] == pytest.approx(torch.stack(right).mean().item(), abs=1e-6)
    assert len(results(cli)["accuracy_per_step"]) == 5


def test_an_ensemble_of_one_is_its_network():
    one = fit("one")
    alone = results(main(words("test", **DATA, ckpt_path=one)))
    cli = main([*words("test", **DATA), "--ensemble", str(one)])
    ensemble = results(cli)
    assert results(main(["test", "--config", str(Path(cli.trainer.log_dir) / "config.yaml")])) == ensemble
    different = {"checkpoint", "ensemble"}
    assert {k: v for k, v in ensemble.items() if k not in different} == {
        k: v for k, v in alone.items() if k not in different
    }


def test_a_runs_config_goes_with_networks_of_its_settings():
    one, two = fit("one"), fit("two", seed_everything=1)
    config = next(Path("one").rglob("config.yaml"))
    cli = main(["test", f"--config={config}", "--model.eval_inner_steps=3", "--ensemble", str(one), str(two)])
    assert results(cli)["episodes"] == 12
    assert results(main(["test", "--config", str(Path(cli.trainer.log_dir) / "config.yaml")])) == results(cli)
    with pytest.raises(
        SettingError, match=r"model\.inner_lr is 0\.1, but ensemble .* was trained with 0\.3: each netw"
    ):
        main(["test", f"--config={config}", "--model.inner_lr=0.1", "--ensemble", str(one)])
    with pytest.raises(SettingError, match=r"model\.net\.hidden_channels is 6, but ensemble .* was trained with 4"):
        main(["test", f"--config={config}", "--model.net.hidden_channels=6", "--ensemble", str(one)])


def test_networks_of_the_package_are_named():
    flags = {**DATA, "data.ways": 5, "data.test_episodes": 2, "data.test_classes": 8}
    names = ["omniglot_5way_1shot", str(packaged("omniglot_5way_1shot"))]
    assert results(main([*words("test", **flags), "--ensemble", *names]))["ensemble"] == names


def test_an_ensemble_of_regressions_averages_their_outputs():
    one, two = (fit(name, SINUSOIDS, seed_everything=seed) for seed, name in enumerate(("one", "two")))
    data = {key: value for key, value in SINUSOIDS.items() if not key.startswith("model.")}
    found = results(main([*words("test", **data), "--ensemble", str(one), str(two)]))
    assert found["mse"] > 0
    assert len(found["mse_per_step"]) == 3


def test_what_does_not_fit_is_refused_before_anything_is_written():
    one = fit("one")
    there = set(Path().rglob("*"))
    for flags, names, message in (
        ({}, ["none.ckpt"], r"ensemble none\.ckpt is not a file; give a checkpoint"),
        ({}, [one, one], r"ensemble names .*best\.ckpt more than once"),
        ({"ckpt_path": one}, [one], r"ckpt_path .* is not supported with ensemble; name it there instead"),
        ({"data.ways": 4}, [one], r"ensemble .*best\.ckpt: model\.net has 3 outputs, but the episodes have 4 classes"),
        ({}, [one, "omniglot_5way_1shot"], r"ensemble omniglot_5way_1shot: model\.net has 5 outputs, but .* 3 classes"),
    ):
        with pytest.raises(SettingError, match=message):
            main([*words("test", **{**DATA, **flags}), "--ensemble", *map(str, names)])
    assert set(Path().rglob("*")) == there


def test_classes_and_numbers_are_not_averaged():
    one, two = fit("one"), fit("two", SINUSOIDS)
    data = {key: value for key, value in SINUSOIDS.items() if not key.startswith("model.")}
    with pytest.raises(SettingError, match=r"ensemble .*one.*: model\.net does not take the episodes' inputs"):
        main([*words("test", **data), "--ensemble", str(two), str(one)])


def test_untrusted_code_is_refused():
    own = fit(
        "own",
        **{"model.net": "tests.training.test_checkpoints.WithDropout"}
        | dict.fromkeys(("model.net.hidden_channels", "model.net.blocks")),
    )
    with pytest.raises(SettingError, match=r"ensemble .*WithDropout.*--trust_checkpoint true"):
        main([*words("test", **DATA), "--ensemble", str(own)])
    trusted = words("test", **DATA, trust_checkpoint="true")
    assert results(main([*trusted, "--ensemble", str(own)]))["ensemble"] == [str(own)]
