"""The classes that a network itself says, where it has learnt some."""

from torch import nn

from ..models import load_classifier
from ..train.backbones import load_method
from .features import top1_percent
from .task import Task, check_one_label


def own_classifier(task: Task) -> dict:
    """Top-1 accuracy of the network's own classifier, of which nothing is trained here.

    Args:
        task: of a file that `finetune` saved, or a run of a method with a `classifier` of its
            features, as `distill`.

    Returns:
        `top1_percent`, and the `protocol`.

    Raises:
        ValueError: a network without a classifier, or images without one label each.

    Paper: SimCLRv2, arXiv 2006.10029.
    """
    check_one_label("classifier", task.train, task.test)
    run, about = task.network.run, task.network.about
    if about.get("method") == "finetune":
        network, _ = load_classifier(about["file"])
    else:
        method = run and load_method(run, trained=about["weights"] == "pretrained")
        if not hasattr(method, "classifier"):
            raise ValueError(
                f"evaluate: classifier needs a network that has one, got {about}. Give a file that "
                "finetune saved, a run of distill, or use linear."
            )
        network = nn.Sequential(method.backbone, method.classifier)
    scores, y = task.features("test", network)
    top1 = top1_percent(scores.argmax(1), y)
    return {"top1_percent": {"classifier": top1}, "protocol": {"classes": scores.shape[1]}}
