// swift-tools-version: 6.0
import PackageDescription

// At the top of the repository, for only there can an app add a package by the repository's URL. Its sources are in apple/.
//
// Elsewhere than on Apple's systems there is no Core ML to run a model, but the rest, which is tokenizers, states, sampling and
// streaming, builds and is tested there.
#if canImport(Darwin)
    // only for bundles with a tokenizer.json; the World vocabulary is read by code of our own
    let dependencies: [Package.Dependency] = [
        .package(url: "https://github.com/huggingface/swift-transformers", "1.1.6"..<"2.0.0")
    ]
    let products: [Target.Dependency] = [
        .product(name: "Hub", package: "swift-transformers"),
        .product(name: "Tokenizers", package: "swift-transformers"),
    ]
#else
    let dependencies: [Package.Dependency] = []
    let products: [Target.Dependency] = []
#endif

let package = Package(
    name: "RWKVEdge",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "RWKVEdge", targets: ["RWKVEdge"])
    ],
    dependencies: dependencies,
    targets: [
        .target(name: "RWKVEdge", dependencies: products, path: "apple/Sources/RWKVEdge"),
        .testTarget(name: "RWKVEdgeTests", dependencies: ["RWKVEdge"], path: "apple/Tests/RWKVEdgeTests", exclude: ["Goldens"]),
    ],
    // Core ML's own classes are not all marked for strict checking: an actor keeps them to itself instead
    swiftLanguageModes: [.v5]
)
