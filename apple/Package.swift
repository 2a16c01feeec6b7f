// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "RWKVEdge",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "RWKVEdge", targets: ["RWKVEdge"])
    ],
    dependencies: [
        // only for bundles with a tokenizer.json; the World vocabulary is read by code of our own
        .package(url: "https://github.com/huggingface/swift-transformers", .upToNextMinor(from: "1.1.6"))
    ],
    targets: [
        .target(
            name: "RWKVEdge",
            dependencies: [
                .product(name: "Hub", package: "swift-transformers"),
                .product(name: "Tokenizers", package: "swift-transformers"),
            ]
        ),
        .testTarget(name: "RWKVEdgeTests", dependencies: ["RWKVEdge"], exclude: ["Goldens"]),
    ],
    // Core ML's own classes are not all marked for strict checking: an actor keeps them to itself instead
    swiftLanguageModes: [.v5]
)
