import Foundation

/// `manifest.json` of a bundle, as far as running a Core ML bundle needs it. The format: docs/bundle.md
public struct Manifest: Decodable, Sendable {
    /// The newest format that this package reads.
    static let newestFormat = 1

    public let format: Int
    /// Of the unquantized model: states are bound to it, at any width.
    public let modelID: String
    public let spec: Spec
    /// Every tensor of the state, `{layer}.{tensor}`.
    public let state: [StateTensor]
    /// One entry for each package and function, in the order in which they are run.
    public let graphs: [Graph]
    /// Every other file of the bundle, by its path in it.
    public let files: [String: File]
    /// The state file that every text begins from; nil for the first values of `state`.
    public let initialState: String?
    public let tokenizer: Tokenizer?
    /// How the model was taught to chat.
    public let prompt: ChatTemplate?
    /// Defaults of a generation.
    public let sampling: Sampling

    enum CodingKeys: String, CodingKey {
        case format, spec, state, graphs, files, tokenizer, prompt, sampling
        case modelID = "model_id"
        case initialState = "initial_state"
    }

    public struct Spec: Decodable, Sendable, Equatable {
        public let version: String
        public let nLayer: Int
        public let nEmbd: Int
        public let nHead: Int
        public let headSize: Int
        public let nFfn: Int
        public let nVocab: Int

        enum CodingKeys: String, CodingKey {
            case version
            case nLayer = "n_layer"
            case nEmbd = "n_embd"
            case nHead = "n_head"
            case headSize = "head_size"
            case nFfn = "n_ffn"
            case nVocab = "n_vocab"
        }
    }

    public struct StateTensor: Decodable, Sendable, Equatable {
        public let name: String
        public let shape: [Int]
        /// The value of every element before the first token.
        public let first: Float
        /// What a graph holds is multiplied by this to give the state.
        public let factor: Float
    }

    public struct Value: Decodable, Sendable, Equatable {
        public let name: String
        public let dtype: String
        public let shape: [Int]
    }

    /// Where the state of a part lies in its one Core ML state.
    public struct Packed: Decodable, Sendable, Equatable {
        public let name: String
        /// Layers of the part, rows, width.
        public let shape: [Int]
        public let firstLayer: Int
        /// Tensor -> its first row and the one after its last.
        public let rows: [String: [Int]]

        enum CodingKeys: String, CodingKey {
            case name, shape, rows
            case firstLayer = "first_layer"
        }

        /// Where each tensor of the state lies: places of elements.
        var places: [String: Range<Int>] {
            let (nRows, width) = (shape[1], shape[2])
            var places: [String: Range<Int>] = [:]
            for layer in 0..<shape[0] {
                for (name, range) in rows {
                    places["\(firstLayer + layer).\(name)"] = (layer * nRows + range[0]) * width..<(layer * nRows + range[1]) * width
                }
            }
            return places
        }
    }

    public struct Graph: Decodable, Sendable {
        public let file: String
        public let function: String
        /// From 1 to `parts`: a large model is split by layers.
        public let part: Int
        public let parts: Int
        public let profile: String
        /// How many tokens a call takes.
        public let nTokens: Int
        /// `explicit` (inputs and outputs) or `packed` (one Core ML state).
        public let state: String
        public let inputs: [Value]
        public let outputs: [Value]
        /// Nil where the state is explicit, and in a part that has no layers.
        public let packed: Packed?

        /// The tensors of the state that this part keeps, in one way or the other, with their numbers of elements.
        var tensors: [(name: String, count: Int)] {
            inputs.filter { $0.name.hasPrefix("state_") }.map { (Self.tensor(of: $0.name), $0.shape.reduce(1, *)) }
                + (packed?.places ?? [:]).map { ($0.key, $0.value.count) }
        }

        /// `state_12_att_x` -> `12.att_x`
        static func tensor(of input: String) -> String {
            let steps = input.split(separator: "_", maxSplits: 2)
            return steps.count == 3 ? "\(steps[1]).\(steps[2])" : input
        }

        enum CodingKeys: String, CodingKey {
            case file, function, part, parts, profile, state, inputs, outputs, packed
            case nTokens = "T"
        }
    }

    /// Of the tokenizer's file, to which the last ids of a state belong; nil without a tokenizer.
    var tokenizerSHA256: String? { tokenizer.flatMap { files[$0.file]?.sha256 } }

    public struct File: Decodable, Sendable, Equatable {
        public let bytes: Int
        public let sha256: String
    }

    public struct Tokenizer: Decodable, Sendable, Equatable {
        /// `json` or `world`.
        public let kind: String
        public let file: String
        /// Tokens that end a text, each of them.
        public let eosTokenIDs: [Int]
        /// The token that stands before a text's first one, for a model that has read nothing.
        public let bosTokenID: Int

        enum CodingKeys: String, CodingKey {
            case kind, file
            case eosTokenIDs = "eos_token_ids"
            case bosTokenID = "bos_token_id"
        }
    }

    /// Read a manifest.
    ///
    /// Throws `RWKVError.bundle` if it is damaged, of a newer format, or not for Core ML.
    public static func decode(_ data: Data) throws -> Manifest {
        // first what decides whether the rest can be understood
        struct Head: Decodable {
            struct Graph: Decodable { let target: String }
            let format: Int
            let graphs: [Graph]
        }
        struct Format: Decodable { let format: Int }
        let decoder = JSONDecoder()
        do {
            let found = try decoder.decode(Format.self, from: data).format
            guard found <= newestFormat else {
                throw RWKVError.bundle("The bundle is of format \(found) and this release reads format \(newestFormat): update the app.")
            }
            guard found >= 1 else {
                throw RWKVError.bundle("The bundle states format \(found), which does not exist: export it again.")
            }
            if let other = try decoder.decode(Head.self, from: data).graphs.first(where: { $0.target != "coreml" }) {
                throw RWKVError.bundle("The bundle was exported for \(other.target), not for Core ML: export it with the target coreml.")
            }
            return try decoder.decode(Manifest.self, from: data)
        } catch let error as DecodingError {
            throw RWKVError.bundle("The bundle's manifest.json is damaged (\(Self.describe(error))): export or copy the bundle again.")
        }
    }

    private static func describe(_ error: DecodingError) -> String {
        let context: DecodingError.Context
        switch error {
        case .typeMismatch(_, let about), .valueNotFound(_, let about), .keyNotFound(_, let about), .dataCorrupted(let about):
            context = about
        @unknown default:
            return "it cannot be read"
        }
        let place = context.codingPath.map(\.stringValue).joined(separator: ".")
        return place.isEmpty ? context.debugDescription : "\(place): \(context.debugDescription)"
    }
}
