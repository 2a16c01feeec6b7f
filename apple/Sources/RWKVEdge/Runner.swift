#if canImport(CoreML)

import CoreML
import Foundation

/// Runs the step of a bundle: tokens in, logits and a state out. For one task at a time; `RWKVModel` sees to that.
final class Runner {
    /// A package: its two functions, and its share of the state where that is packed.
    private struct Part {
        let decode: MLModel
        let prefill: MLModel
        let graphs: [String: Manifest.Graph]
        let packed: MLState?
    }

    /// A state that can be gone back to.
    struct Snapshot {
        /// Explicit: the arrays themselves, which nobody writes to after Core ML gave them.
        fileprivate let explicit: [String: MLFeatureValue]
        /// Packed: copies, one for each part.
        fileprivate let packed: [[Float]]
        let nTokens: Int
        let logits: [Float]?
    }

    private let manifest: Manifest
    private let parts: [Part]
    /// The state that every text begins from.
    private let first: SavedState
    /// State input -> what to hand to the next call.
    private var explicit: [String: MLFeatureValue] = [:]

    /// Tokens that the state has read.
    private(set) var nTokens = 0
    /// After the last of them; nil before the first.
    private(set) var logits: [Float]?
    /// How many tokens prefill takes in one call.
    let chunk: Int

    init(_ bundle: ModelBundle, units: MLComputeUnits, cache: URL?) async throws {
        let manifest = bundle.manifest
        self.manifest = manifest
        var parts: [Part] = []
        for number in 1...max(manifest.graphs.map(\.part).max() ?? 1, 1) {
            var graphs: [String: Manifest.Graph] = [:]
            for graph in manifest.graphs where graph.part == number { graphs[graph.function] = graph }
            guard let graph = graphs["decode"] else {
                throw RWKVError.bundle("Part \(number) of the model has no function decode: export the bundle again.")
            }
            let decode = try await CompiledModels.load(graph.file, function: "decode", of: bundle, units: units, cache: cache)
            let prefill = try await CompiledModels.load(graph.file, function: "prefill", of: bundle, units: units, cache: cache)
            // made once, used by both functions: the memory of a text is one
            let packed = graph.packed == nil ? nil : decode.makeState()
            parts.append(Part(decode: decode, prefill: prefill, graphs: graphs, packed: packed))
        }
        self.parts = parts
        chunk = manifest.graphs.filter { $0.function == "prefill" }.map(\.nTokens).min() ?? 1
        if let name = manifest.initialState {
            first = try SavedState(contentsOf: bundle.url(of: name), manifest: manifest)
        } else {
            first = SavedState(firstOf: manifest)
        }
        try load(nil)
    }

    /// Read tokens: `chunk` of them, or one.
    func step(_ tokens: [Int]) throws {
        if let wrong = tokens.first(where: { !(0..<manifest.spec.nVocab).contains($0) }) {
            throw RWKVError.input("Token \(wrong) is outside the vocabulary of 0 to \(manifest.spec.nVocab - 1).")
        }
        guard tokens.count == 1 || tokens.count == chunk else {
            throw RWKVError.input("A step reads 1 or \(chunk) tokens, not \(tokens.count).")
        }
        try autoreleasepool { () -> Void in
            let ids = try MLMultiArray.tokens(tokens)
            // what goes from part to part
            var passed = ["tokens": MLFeatureValue(multiArray: ids)]
            var state: [String: MLFeatureValue] = [:]
            for part in parts {
                let isDecode = tokens.count == 1
                guard let graph = part.graphs[isDecode ? "decode" : "prefill"] else { continue }
                var inputs: [String: MLFeatureValue] = [:]
                for input in graph.inputs {
                    guard let value = explicit[input.name] ?? passed[input.name] else {
                        throw RWKVError.bundle("\(graph.file) takes \(input.name), which nothing gives: export the bundle again.")
                    }
                    inputs[input.name] = value
                }
                let given = try predict(isDecode ? part.decode : part.prefill, Features(inputs), part.packed)
                for output in graph.outputs {
                    guard let value = given.featureValue(for: output.name) else {
                        throw RWKVError.model("\(graph.file) gave no \(output.name).")
                    }
                    let name = output.name.hasSuffix("_out") ? String(output.name.dropLast(4)) : output.name
                    if explicit[name] != nil {
                        state[name] = value  // the next input, as it is: no copy
                    } else {
                        passed[name] = value
                    }
                }
            }
            guard let last = passed["logits"]?.multiArrayValue else {
                throw RWKVError.model("The model gave no logits.")
            }
            let read = try last.floats()
            guard read.count == manifest.spec.nVocab, state.count == explicit.count else {
                throw RWKVError.model("The model gave \(read.count) logits, expected \(manifest.spec.nVocab).")
            }
            // together, and only now: what fails above leaves an explicit state as it was
            explicit = state
            logits = read
            nTokens += tokens.count
        }
    }

    private func predict(_ model: MLModel, _ inputs: Features, _ state: MLState?) throws -> MLFeatureProvider {
        do {
            if let state {
                return try model.prediction(from: inputs, using: state)
            }
            return try model.prediction(from: inputs)
        } catch {
            throw RWKVError.model("Core ML failed: \(error.localizedDescription)")
        }
    }

    // MARK: - State

    func snapshot() throws -> Snapshot {
        let packed = try parts.compactMap { try Self.read($0.packed, $0.graphs) }
        return Snapshot(explicit: explicit, packed: packed, nTokens: nTokens, logits: logits)
    }

    func restore(_ snapshot: Snapshot) throws {
        for (part, values) in zip(parts, snapshot.packed) { try Self.write(values, part.packed, part.graphs) }
        explicit = snapshot.explicit
        nTokens = snapshot.nTokens
        logits = snapshot.logits
    }

    /// Begin from a state, or with nil from where every text begins.
    func load(_ saved: SavedState?) throws {
        let saved = saved ?? first
        try saved.check(manifest)
        if saved.tensors.values.contains(where: { tensor in tensor.values.contains { abs($0) >= 65520 } }) {
            throw RWKVError.state("The state holds numbers beyond float16, in which this bundle computes.")
        }
        var explicit: [String: MLFeatureValue] = [:]
        for part in parts {
            guard let graph = part.graphs["decode"] else { continue }
            if let packed = graph.packed {
                try Self.write(Self.pack(saved, packed), part.packed, part.graphs)
            } else {
                // filled by hand, with zeros too: a new array holds whatever was there before
                for input in graph.inputs where input.name.hasPrefix("state_") {
                    guard let tensor = saved.tensors[Self.tensorName(input.name)], tensor.values.count == input.shape.reduce(1, *) else {
                        throw RWKVError.bundle("\(input.name) of \(graph.file) is not in the manifest's state: export the bundle again.")
                    }
                    let array = try MLMultiArray.halves(tensor.values, shape: input.shape)
                    explicit[input.name] = MLFeatureValue(multiArray: array)
                }
            }
        }
        self.explicit = explicit
        nTokens = saved.nTokens
        logits = saved.logits
    }

    /// Copy the state out, as a state file has it.
    func save() throws -> SavedState {
        var tensors: [String: SavedState.Tensor] = [:]
        var shapes: [String: [Int]] = [:]
        for tensor in manifest.state { shapes[tensor.name] = tensor.shape }
        for (input, value) in explicit {
            let name = Self.tensorName(input)
            guard let array = value.multiArrayValue, let shape = shapes[name] else { continue }
            tensors[name] = SavedState.Tensor(shape: shape, values: try array.floats())
        }
        for part in parts {
            guard let packed = part.graphs["decode"]?.packed, let values = try Self.read(part.packed, part.graphs) else { continue }
            for (name, range) in try Self.places(packed) {
                guard let shape = shapes[name], range.upperBound <= values.count else { continue }
                tensors[name] = SavedState.Tensor(shape: shape, values: Array(values[range]))
            }
        }
        let saved = SavedState(modelID: manifest.modelID, nTokens: nTokens, tensors: tensors, logits: nTokens > 0 ? logits : nil)
        try saved.check(manifest)
        return saved
    }

    /// `state_12_att_x` -> `12.att_x`
    private static func tensorName(_ input: String) -> String {
        let steps = input.split(separator: "_", maxSplits: 2)
        return steps.count == 3 ? "\(steps[1]).\(steps[2])" : input
    }

    /// Where each tensor lies in a packed state: places of elements.
    private static func places(_ packed: Manifest.Packed) throws -> [String: Range<Int>] {
        let isSound = packed.shape.count == 3 && packed.rows.values.allSatisfy { range in
            range.count == 2 && 0 <= range[0] && range[0] < range[1] && range[1] <= packed.shape[1]
        }
        guard isSound else {
            throw RWKVError.bundle("The manifest's packed state is not (layers, rows, width): export the bundle again.")
        }
        let (rows, width) = (packed.shape[1], packed.shape[2])
        var places: [String: Range<Int>] = [:]
        for layer in 0..<packed.shape[0] {
            for (name, range) in packed.rows {
                let start = layer * rows
                places["\(packed.firstLayer + layer).\(name)"] = (start + range[0]) * width..<(start + range[1]) * width
            }
        }
        return places
    }

    private static func pack(_ saved: SavedState, _ packed: Manifest.Packed) throws -> [Float] {
        let ranges = try places(packed)
        var values = [Float](repeating: 0, count: packed.shape.reduce(1, *))
        for (name, range) in ranges {
            guard let tensor = saved.tensors[name], tensor.values.count == range.count else {
                throw RWKVError.bundle("\(name) of the packed state is not in the manifest's state: export the bundle again.")
            }
            values.replaceSubrange(range, with: tensor.values)
        }
        return values
    }

    private static func read(_ state: MLState?, _ graphs: [String: Manifest.Graph]) throws -> [Float]? {
        guard let state, let name = graphs["decode"]?.packed?.name else { return nil }
        return try state.withMultiArray(for: name) { try $0.floats() }
    }

    private static func write(_ values: [Float], _ state: MLState?, _ graphs: [String: Manifest.Graph]) throws {
        guard let state, let name = graphs["decode"]?.packed?.name else { return }
        try state.withMultiArray(for: name) { try $0.write(values) }
    }
}

/// What one call takes. Outputs of the call before are handed over as they are.
private final class Features: MLFeatureProvider {
    private let values: [String: MLFeatureValue]

    init(_ values: [String: MLFeatureValue]) {
        self.values = values
    }

    var featureNames: Set<String> { Set(values.keys) }

    func featureValue(for featureName: String) -> MLFeatureValue? {
        values[featureName]
    }
}

#endif
