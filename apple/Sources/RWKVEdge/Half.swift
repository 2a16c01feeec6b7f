/// Half precision, bit by bit: `Float16` does not exist for Intel Macs, and an app may be built for both.
enum Half {
    /// The value of a half: exact.
    static func float(_ half: UInt16) -> Float {
        let sign = UInt32(half & 0x8000) << 16
        let rest = UInt32(half & 0x7FFF)
        if rest >= 0x7C00 {  // infinity or no number
            return Float(bitPattern: sign | 0x7F80_0000 | ((rest & 0x03FF) << 13))
        }
        // times 2^112, the difference of the exponents' biases; subnormal halves come out right as well
        let magnitude = Float(bitPattern: rest << 13) * Float(bitPattern: 0x7780_0000)
        return Float(bitPattern: sign | magnitude.bitPattern)
    }

    /// The half that is nearest to a value, ties to even; beyond its range, infinity.
    static func bits(_ value: Float) -> UInt16 {
        let pattern = value.bitPattern
        let sign = UInt16(truncatingIfNeeded: (pattern >> 16) & 0x8000)
        let rest = pattern & 0x7FFF_FFFF
        if rest > 0x7F80_0000 { return sign | 0x7E00 }
        if rest >= 0x477F_F000 { return sign | 0x7C00 }  // 65520: the first that rounds up to infinity
        if rest < 0x3880_0000 {  // below 2^-14 a half counts in steps of 2^-24
            let steps = (Float(bitPattern: rest) * 16_777_216).rounded(.toNearestOrEven)
            return sign | UInt16(steps)
        }
        let odd = (rest >> 13) & 1
        return sign | UInt16(truncatingIfNeeded: (rest + 0x0FFF + odd - 0x3800_0000) >> 13)
    }
}
