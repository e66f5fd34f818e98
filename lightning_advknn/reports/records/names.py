"""How tables and figures name data sets, networks, methods and victims."""

DATA_CLASSES = {
    "cifar10": "CIFAR10",
    "digits": "Digits",
    "fashion_mnist": "FashionMNIST",
    "gtsrb": "GTSRB",
    "kmnist": "KMNIST",
    "mnist": "MNIST",
    "svhn": "SVHN",
}
"""Class of a data set, by its folder among the results."""

DATA_TITLES = {**DATA_CLASSES, "cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}
KIND_TITLES = {"origin": "Origin", "dknnb": "DkNNB", "dknnb_cl": "DkNNB+CL"}
NETWORK_TITLES = {"lenet5": "LeNet5"}
VICTIM_TITLES = {"dnn": "DNN", "knn": "kNN", "dknn": "DkNN"}
